resource "aws_glue_catalog_database" "events" {
  name        = "events"
  description = "Events of the central bus"
}

# A partition a day, worked out from the query itself: no crawler, nothing to add each day.
resource "aws_glue_catalog_table" "valid" {
  name          = "valid"
  database_name = aws_glue_catalog_database.events.name
  table_type    = "EXTERNAL_TABLE"

  parameters = {
    EXTERNAL                    = "TRUE"
    "projection.enabled"        = "true"
    "projection.day.type"       = "date"
    "projection.day.format"     = "yyyy-MM-dd"
    "projection.day.range"      = "2026-01-01,NOW"
    "storage.location.template" = "s3://${aws_s3_bucket.lake.id}/events/day=$${day}/"
  }

  partition_keys {
    name = "day"
    type = "string"
  }

  storage_descriptor {
    location      = "s3://${aws_s3_bucket.lake.id}/events/"
    input_format  = "org.apache.hadoop.mapred.TextInputFormat"
    output_format = "org.apache.hadoop.hive.ql.io.HiveIgnoreKeyTextOutputFormat"

    ser_de_info {
      serialization_library = "org.openx.data.jsonserde.JsonSerDe"
      parameters            = { "mapping.detail_type" = "detail-type" }
    }

    dynamic "columns" {
      for_each = ["id", "source", "detail_type", "time", "account", "region", "detail"]

      content {
        name = columns.value
        type = "string"
      }
    }
  }
}

resource "aws_athena_workgroup" "events" {
  name = "events"

  configuration {
    enforce_workgroup_configuration = true

    result_configuration {
      output_location = "s3://${aws_s3_bucket.lake.id}/results/"

      encryption_configuration {
        encryption_option = "SSE_S3"
      }
    }
  }
}

# Repetitions are counted once: by the id that they have in common.
resource "aws_athena_named_query" "widgets_by_day" {
  name      = "widgets by day"
  workgroup = aws_athena_workgroup.events.id
  database  = aws_glue_catalog_database.events.name

  query = <<-EOT
    SELECT day, count(DISTINCT json_extract_scalar(detail, '$.relayed.id')) AS widgets
    FROM valid
    WHERE source = 'valid.cwi.servicea' AND detail_type = 'NEW_WIDGET'
    GROUP BY day ORDER BY day
  EOT
}

output "bucket_name" {
  value = aws_s3_bucket.lake.id
}

output "stream_name" {
  value = aws_kinesis_firehose_delivery_stream.lake.name
}

output "undelivered_queue_url" {
  description = "What Firehose did not take; alarm on its depth."
  value       = aws_sqs_queue.undelivered.id
}
