variable "bus_name" {
  type    = string
  default = "central"
}

variable "service_accounts" {
  type        = list(string)
  description = "Ids of the accounts that may forward events here."
}

variable "source_prefix" {
  type        = string
  default     = "cwi."
  description = "What the sources of the services' events begin with."
}

variable "legacy_source" {
  type        = string
  default     = "valid.cwi.orders"
  description = "Source of the valid events that figbridge writes to the legacy database (the mappings' match)."
}

variable "code_bucket" {
  type        = string
  default     = null
  description = "Bucket with relay.zip (docs/many-accounts.md says how it is made). Null: the relay runs as a container."
}

variable "relay_role_arn" {
  type        = string
  default     = null
  description = "Role of the relay's container; attach relay_policy_arn to it. Null with code_bucket."

  validation {
    condition     = (var.relay_role_arn == null) != (var.code_bucket == null)
    error_message = "Give code_bucket for the relay as a function, or relay_role_arn for its container."
  }
}

variable "archive_days" {
  type    = number
  default = 365
}
