# The account of a service: its own bus, and a rule with a role that forwards its events to the central account.

data "aws_caller_identity" "this" {}

resource "aws_cloudwatch_event_bus" "service" {
  name = var.bus_name
}

# Only what this service says of itself. EventBridge forwards an event from bus to bus once; so does the relay behind it.
resource "aws_cloudwatch_event_rule" "forward" {
  name           = "${var.bus_name}-to-central"
  description    = "Events of this service to the central account"
  event_bus_name = aws_cloudwatch_event_bus.service.name
  event_pattern  = jsonencode({ source = [var.event_source] })
}

resource "aws_cloudwatch_event_target" "central" {
  rule           = aws_cloudwatch_event_rule.forward.name
  event_bus_name = aws_cloudwatch_event_bus.service.name
  target_id      = "central"
  arn            = var.central_bus_arn
  role_arn       = aws_iam_role.forward.arn

  retry_policy {
    maximum_event_age_in_seconds = 86400
    maximum_retry_attempts       = 185
  }

  dead_letter_config {
    arn = aws_sqs_queue.undelivered.arn
  }
}

# A bus of another account takes events only with a role: the central account sees who sends, and this one who may.
resource "aws_iam_role" "forward" {
  name_prefix = "${var.bus_name}-forward-"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "events.amazonaws.com" }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "aws:SourceAccount" = data.aws_caller_identity.this.account_id } }
    }]
  })
}

resource "aws_iam_role_policy" "forward" {
  name = "forward"
  role = aws_iam_role.forward.id

  policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = "events:PutEvents", Resource = var.central_bus_arn }]
  })
}

# What the central bus did not take for 24 hours. Without it EventBridge drops the event.
resource "aws_sqs_queue" "undelivered" {
  name                      = "${var.bus_name}-undelivered"
  message_retention_seconds = 1209600
  sqs_managed_sse_enabled   = true
}

resource "aws_sqs_queue_policy" "undelivered" {
  queue_url = aws_sqs_queue.undelivered.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "RuleGivesUp"
      Effect    = "Allow"
      Principal = { Service = "events.amazonaws.com" }
      Action    = "sqs:SendMessage"
      Resource  = aws_sqs_queue.undelivered.arn
      Condition = { ArnEquals = { "aws:SourceArn" = aws_cloudwatch_event_rule.forward.arn } }
    }]
  })
}
