# A rule of a bus, its queue, and the queue for what could not be delivered or was never settled.

variable "name" {
  type        = string
  description = "Of the rule and, with the suffix -dead, of the queues."
}

variable "bus_name" {
  type = string
}

variable "description" {
  type = string
}

variable "pattern" {
  type        = any
  description = "The rule's event pattern, as an object."
}

variable "visibility_timeout" {
  type    = number
  default = 60
}

variable "max_receive_count" {
  type    = number
  default = 1000
}

resource "aws_cloudwatch_event_rule" "this" {
  name           = var.name
  description    = var.description
  event_bus_name = var.bus_name
  event_pattern  = jsonencode(var.pattern)
}

resource "aws_cloudwatch_event_target" "this" {
  rule           = aws_cloudwatch_event_rule.this.name
  event_bus_name = var.bus_name
  target_id      = "queue"
  arn            = aws_sqs_queue.this.arn

  # EventBridge's own longest; without a dead-letter queue it would drop the event after it
  retry_policy {
    maximum_event_age_in_seconds = 86400
    maximum_retry_attempts       = 185
  }

  dead_letter_config {
    arn = aws_sqs_queue.dead.arn
  }
}

# Standard, not FIFO: as a rule's target a FIFO queue gets one fixed message group, that is, one event at a time.
resource "aws_sqs_queue" "this" {
  name                       = var.name
  message_retention_seconds  = 1209600
  visibility_timeout_seconds = var.visibility_timeout
  receive_wait_time_seconds  = 20
  sqs_managed_sse_enabled    = true

  redrive_policy = jsonencode({
    deadLetterTargetArn = aws_sqs_queue.dead.arn
    maxReceiveCount     = var.max_receive_count
  })
}

resource "aws_sqs_queue" "dead" {
  name                      = "${var.name}-dead"
  message_retention_seconds = 1209600
  sqs_managed_sse_enabled   = true
}

data "aws_iam_policy_document" "rule_delivers" {
  for_each = { queue = aws_sqs_queue.this.arn, dead = aws_sqs_queue.dead.arn }

  statement {
    sid       = "RuleDelivers"
    actions   = ["sqs:SendMessage"]
    resources = [each.value]

    principals {
      type        = "Service"
      identifiers = ["events.amazonaws.com"]
    }

    condition {
      test     = "ArnEquals"
      variable = "aws:SourceArn"
      values   = [aws_cloudwatch_event_rule.this.arn]
    }
  }
}

resource "aws_sqs_queue_policy" "this" {
  queue_url = aws_sqs_queue.this.id
  policy    = data.aws_iam_policy_document.rule_delivers["queue"].json
}

resource "aws_sqs_queue_policy" "dead" {
  queue_url = aws_sqs_queue.dead.id
  policy    = data.aws_iam_policy_document.rule_delivers["dead"].json
}

output "queue_arn" {
  value = aws_sqs_queue.this.arn
}

output "queue_url" {
  value = aws_sqs_queue.this.id
}

output "dead_letter_queue_url" {
  value = aws_sqs_queue.dead.id
}
