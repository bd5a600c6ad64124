# Service C in the central account: all valid events as JSON lines in S3 by way of Firehose. athena.tf has the queries.

variable "bus_name" {
  type    = string
  default = "central"
}

variable "bucket_name" {
  type        = string
  description = "Name of the bucket that is made; it is not destroyed with the rest."
}

data "aws_caller_identity" "this" {}

resource "aws_cloudwatch_event_rule" "lake" {
  name           = "${var.bus_name}-lake"
  description    = "All valid events to the lake"
  event_bus_name = var.bus_name
  event_pattern  = jsonencode({ source = [{ prefix = "valid." }] })
}

resource "aws_cloudwatch_event_target" "lake" {
  rule           = aws_cloudwatch_event_rule.lake.name
  event_bus_name = var.bus_name
  target_id      = "lake"
  arn            = aws_kinesis_firehose_delivery_stream.lake.arn
  role_arn       = aws_iam_role.rule.arn

  retry_policy {
    maximum_event_age_in_seconds = 86400
    maximum_retry_attempts       = 185
  }

  dead_letter_config {
    arn = aws_sqs_queue.undelivered.arn
  }
}

resource "aws_sqs_queue" "undelivered" {
  name                      = "${var.bus_name}-lake-undelivered"
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
      Condition = { ArnEquals = { "aws:SourceArn" = aws_cloudwatch_event_rule.lake.arn } }
    }]
  })
}

resource "aws_iam_role" "rule" {
  name_prefix = "lake-rule-"

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

resource "aws_iam_role_policy" "rule" {
  name = "put"
  role = aws_iam_role.rule.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect   = "Allow"
      Action   = ["firehose:PutRecord", "firehose:PutRecordBatch"]
      Resource = aws_kinesis_firehose_delivery_stream.lake.arn
    }]
  })
}

resource "aws_s3_bucket" "lake" {
  bucket = var.bucket_name

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_s3_bucket_public_access_block" "lake" {
  bucket                  = aws_s3_bucket.lake.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_iam_role" "stream" {
  name_prefix = "lake-stream-"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "firehose.amazonaws.com" }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "sts:ExternalId" = data.aws_caller_identity.this.account_id } }
    }]
  })
}

resource "aws_iam_role_policy" "stream" {
  name = "write"
  role = aws_iam_role.stream.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Effect   = "Allow"
        Action   = ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"]
        Resource = aws_s3_bucket.lake.arn
      },
      {
        Effect   = "Allow"
        Action   = ["s3:AbortMultipartUpload", "s3:GetObject", "s3:PutObject"]
        Resource = "${aws_s3_bucket.lake.arn}/*"
      },
    ]
  })
}

resource "aws_kinesis_firehose_delivery_stream" "lake" {
  name        = "${var.bus_name}-lake"
  destination = "extended_s3"

  extended_s3_configuration {
    bucket_arn          = aws_s3_bucket.lake.arn
    role_arn            = aws_iam_role.stream.arn
    prefix              = "events/day=!{timestamp:yyyy-MM-dd}/"
    error_output_prefix = "errors/!{firehose:error-output-type}/day=!{timestamp:yyyy-MM-dd}/"
    buffering_interval  = 60
    buffering_size      = 64
    compression_format  = "GZIP"

    processing_configuration {
      enabled = true

      # EventBridge sends an event without a newline, and Athena reads lines
      processors {
        type = "AppendDelimiterToRecord"

        parameters {
          parameter_name  = "Delimiter"
          parameter_value = "\\n"
        }
      }
    }
  }
}
