# What a figbridge needs in AWS: the bus that it publishes to, the queue that it reads the new system's events from, and the
# policy for its role. The same as deploy/cloudformation/bridge.yaml.

variable "bus_name" {
  type        = string
  default     = "orders"
  description = "forward.sink.bus. Both directions share it; sources keep them apart."
}

variable "new_system_source" {
  type        = string
  default     = "shop.next"
  description = "The event source of the new system, as in the mappings' match."
}

resource "aws_cloudwatch_event_bus" "this" {
  name = var.bus_name
}

# Only the new system's events. A pattern that also matched legacy.* would bring our own events back as commands. The bridge
# tells poison from bad weather and has its own dead letters, so a message is set aside only after a thousand attempts.
module "reverse" {
  source      = "../rule-to-queue"
  name        = "${var.bus_name}-reverse"
  description = "Events of the new system to the bridge"
  bus_name    = aws_cloudwatch_event_bus.this.name
  pattern     = { source = [var.new_system_source] }
}

data "aws_iam_policy_document" "bridge" {
  # DescribeEventBus: PutEvents reports success for a bus that does not exist, so the bridge looks first
  statement {
    sid       = "Publish"
    actions   = ["events:PutEvents", "events:DescribeEventBus"]
    resources = [aws_cloudwatch_event_bus.this.arn]
  }

  statement {
    sid = "Consume"
    actions = [
      "sqs:ReceiveMessage",
      "sqs:DeleteMessage",
      "sqs:ChangeMessageVisibility",
      "sqs:GetQueueAttributes",
    ]
    resources = [module.reverse.queue_arn]
  }
}

resource "aws_iam_policy" "bridge" {
  name_prefix = "${var.bus_name}-figbridge-"
  description = "What figbridge does in AWS, all of it"
  policy      = data.aws_iam_policy_document.bridge.json
}

output "bus_name" {
  description = "forward.sink.bus"
  value       = aws_cloudwatch_event_bus.this.name
}

output "queue_url" {
  description = "reverse.source.queue_url"
  value       = module.reverse.queue_url
}

output "dead_letter_queue_url" {
  description = "What could not be delivered to the queue, or was never settled; alarm on its depth."
  value       = module.reverse.dead_letter_queue_url
}

output "bridge_policy_arn" {
  description = "For the bridge's role (ECS task role, EKS service account, instance profile)."
  value       = aws_iam_policy.bridge.arn
}
