# The central event account: the bus that services forward to, the archive, and the queue by which valid events of the new
# system return to a legacy database. relay.tf has the relay.

resource "aws_cloudwatch_event_bus" "central" {
  name = var.bus_name
}

resource "aws_cloudwatch_event_bus_policy" "central" {
  event_bus_name = aws_cloudwatch_event_bus.central.name
  policy         = data.aws_iam_policy_document.bus.json
}

data "aws_iam_policy_document" "bus" {
  statement {
    sid       = "ServicesForward"
    actions   = ["events:PutEvents"]
    resources = [aws_cloudwatch_event_bus.central.arn]

    principals {
      type        = "AWS"
      identifiers = var.service_accounts
    }
  }

  # What is valid says the relay and nobody else, in this account neither.
  statement {
    sid       = "OnlyTheRelayMarks"
    effect    = "Deny"
    actions   = ["events:PutEvents"]
    resources = [aws_cloudwatch_event_bus.central.arn]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "StringLike"
      variable = "events:source"
      values   = ["valid.*", "invalid.*"]
    }

    condition {
      test     = "ArnNotEquals"
      variable = "aws:PrincipalArn"
      values   = [local.relay_role_arn]
    }
  }
}

# Every valid event, to be replayed to any rule.
resource "aws_cloudwatch_event_archive" "valid" {
  name             = "${var.bus_name}-valid"
  description      = "Valid events"
  event_source_arn = aws_cloudwatch_event_bus.central.arn
  retention_days   = var.archive_days
  event_pattern    = jsonencode({ source = [{ prefix = "valid." }] })
}

# The source of figbridge's reverse path.
module "reverse" {
  source      = "../rule-to-queue"
  name        = "${var.bus_name}-reverse"
  description = "Valid events for the legacy database"
  bus_name    = aws_cloudwatch_event_bus.central.name
  pattern     = { source = [var.legacy_source] }
}
