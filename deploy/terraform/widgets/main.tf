# Service B in the central account: valid widgets in a DynamoDB table with live counts. api.tf has AppSync, which reads it.

variable "bus_name" {
  type    = string
  default = "central"
}

variable "event_source" {
  type    = string
  default = "valid.cwi.servicea"
}

variable "code_bucket" {
  type        = string
  description = "Bucket with widgets.zip, which holds deploy/functions/widgets.py."
}

# A queue between rule and function, so that a table that throttles costs time and no event.
module "incoming" {
  source             = "../rule-to-queue"
  name               = "${var.bus_name}-widgets"
  description        = "Valid widgets to their table"
  bus_name           = var.bus_name
  pattern            = { source = [var.event_source], "detail-type" = ["NEW_WIDGET"] }
  visibility_timeout = 180
  max_receive_count  = 20
}

resource "aws_dynamodb_table" "widgets" {
  name         = "widgets"
  billing_mode = "PAY_PER_REQUEST"
  hash_key     = "pk"

  attribute {
    name = "pk"
    type = "S"
  }

  point_in_time_recovery {
    enabled = true
  }

  lifecycle {
    prevent_destroy = true
  }
}

data "aws_partition" "this" {}

resource "aws_iam_role" "function" {
  name_prefix = "widgets-"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "lambda.amazonaws.com" }
      Action    = "sts:AssumeRole"
    }]
  })
}

resource "aws_iam_role_policy_attachment" "logs" {
  role       = aws_iam_role.function.name
  policy_arn = "arn:${data.aws_partition.this.partition}:iam::aws:policy/service-role/AWSLambdaBasicExecutionRole"
}

resource "aws_iam_role_policy" "function" {
  name = "widgets"
  role = aws_iam_role.function.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Effect   = "Allow"
        Action   = ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"]
        Resource = module.incoming.queue_arn
      },
      {
        Effect   = "Allow"
        Action   = ["dynamodb:PutItem", "dynamodb:UpdateItem"]
        Resource = aws_dynamodb_table.widgets.arn
      },
    ]
  })
}

resource "aws_lambda_function" "widgets" {
  function_name = "${var.bus_name}-widgets"
  description   = "Writes widgets and counts them"
  runtime       = "python3.13"
  handler       = "widgets.handler"
  s3_bucket     = var.code_bucket
  s3_key        = "widgets.zip"
  role          = aws_iam_role.function.arn
  timeout       = 30

  environment {
    variables = { WIDGETS_TABLE = aws_dynamodb_table.widgets.name }
  }
}

resource "aws_lambda_event_source_mapping" "widgets" {
  event_source_arn        = module.incoming.queue_arn
  function_name           = aws_lambda_function.widgets.arn
  batch_size              = 10
  function_response_types = ["ReportBatchItemFailures"]
  depends_on              = [aws_iam_role_policy.function]
}

output "table_name" {
  value = aws_dynamodb_table.widgets.name
}

output "dead_letter_queue_url" {
  description = "What could not be delivered or written; alarm on its depth."
  value       = module.incoming.dead_letter_queue_url
}
