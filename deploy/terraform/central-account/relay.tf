# The relay: a queue of everything that services forward, and what validates it and publishes it anew. An AWS Lambda
# function where there is code for it, or else a container with the role var.relay_role_arn.

locals {
  runs_as_function = var.code_bucket != null
  relay_role_arn   = local.runs_as_function ? aws_iam_role.relay[0].arn : var.relay_role_arn
}

module "incoming" {
  source             = "../rule-to-queue"
  name               = "${var.bus_name}-relay"
  description        = "What services forward, to the relay"
  bus_name           = aws_cloudwatch_event_bus.central.name
  pattern            = { source = [{ prefix = var.source_prefix }] }
  visibility_timeout = 180 # six times the function's timeout, as AWS advises
}

# What broke its contract, with the reasons.
resource "aws_sqs_queue" "quarantine" {
  name                      = "${var.bus_name}-quarantine"
  message_retention_seconds = 1209600
  sqs_managed_sse_enabled   = true
}

data "aws_iam_policy_document" "relay" {
  statement {
    sid = "Consume"
    actions = [
      "sqs:ReceiveMessage",
      "sqs:DeleteMessage",
      "sqs:ChangeMessageVisibility",
      "sqs:GetQueueAttributes",
    ]
    resources = [module.incoming.queue_arn]
  }

  statement {
    sid       = "Republish"
    actions   = ["events:PutEvents", "events:DescribeEventBus"]
    resources = [aws_cloudwatch_event_bus.central.arn]
  }

  statement {
    sid       = "SetAside"
    actions   = ["sqs:SendMessage", "sqs:GetQueueAttributes"]
    resources = [aws_sqs_queue.quarantine.arn]
  }
}

resource "aws_iam_policy" "relay" {
  name_prefix = "${var.bus_name}-relay-"
  description = "What the relay does in AWS, all of it"
  policy      = data.aws_iam_policy_document.relay.json
}

resource "aws_iam_role" "relay" {
  count       = local.runs_as_function ? 1 : 0
  name_prefix = "${var.bus_name}-relay-"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "lambda.amazonaws.com" }
      Action    = "sts:AssumeRole"
    }]
  })
}

data "aws_partition" "this" {}

resource "aws_iam_role_policy_attachment" "relay" {
  count      = local.runs_as_function ? 1 : 0
  role       = aws_iam_role.relay[0].name
  policy_arn = aws_iam_policy.relay.arn
}

resource "aws_iam_role_policy_attachment" "relay_logs" {
  count      = local.runs_as_function ? 1 : 0
  role       = aws_iam_role.relay[0].name
  policy_arn = "arn:${data.aws_partition.this.partition}:iam::aws:policy/service-role/AWSLambdaBasicExecutionRole"
}

resource "aws_lambda_function" "relay" {
  count         = local.runs_as_function ? 1 : 0
  function_name = "${var.bus_name}-relay"
  description   = "Validates events and publishes them anew"
  runtime       = "python3.13"
  architectures = ["x86_64"]
  handler       = "figbridge.functions.relay.handler"
  s3_bucket     = var.code_bucket
  s3_key        = "relay.zip"
  role          = aws_iam_role.relay[0].arn
  memory_size   = 512
  timeout       = 30

  environment {
    variables = {
      FIGBRIDGE_CONFIG = yamlencode({
        relay = {
          sink       = { type = "eventbridge", bus = aws_cloudwatch_event_bus.central.name }
          quarantine = { type = "sqs", queue_url = aws_sqs_queue.quarantine.id }
          contracts  = "contracts"
        }
      })
    }
  }
}

resource "aws_lambda_event_source_mapping" "relay" {
  count                   = local.runs_as_function ? 1 : 0
  event_source_arn        = module.incoming.queue_arn
  function_name           = aws_lambda_function.relay[0].arn
  batch_size              = 10
  function_response_types = ["ReportBatchItemFailures"]
  depends_on              = [aws_iam_role_policy_attachment.relay]
}
