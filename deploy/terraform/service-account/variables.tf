variable "bus_name" {
  type        = string
  default     = "servicea"
  description = "The service publishes here."
}

variable "event_source" {
  type        = string
  default     = "cwi.servicea"
  description = "The source of the service's events. It must not begin with valid. or invalid."

  validation {
    condition     = !startswith(var.event_source, "valid.") && !startswith(var.event_source, "invalid.")
    error_message = "valid. and invalid. are the relay's."
  }
}

variable "central_bus_arn" {
  type        = string
  description = "Output bus_arn of central-account."
}
