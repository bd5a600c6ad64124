# AppSync reads the table; nothing writes through it.

data "aws_caller_identity" "this" {}

resource "aws_appsync_graphql_api" "widgets" {
  name                = "widgets"
  authentication_type = "AWS_IAM"

  schema = <<-EOT
    type Widget { widget_id: ID!  source: String!  made_at: AWSDateTime!  event_id: ID! }
    type Query { widget(widget_id: ID!): Widget  widgets_total: Int! }
    schema { query: Query }
  EOT
}

resource "aws_iam_role" "api" {
  name_prefix = "widgets-api-"

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "appsync.amazonaws.com" }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "aws:SourceAccount" = data.aws_caller_identity.this.account_id } }
    }]
  })
}

resource "aws_iam_role_policy" "api" {
  name = "read"
  role = aws_iam_role.api.id

  policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = "dynamodb:GetItem", Resource = aws_dynamodb_table.widgets.arn }]
  })
}

resource "aws_appsync_datasource" "widgets" {
  api_id           = aws_appsync_graphql_api.widgets.id
  name             = "widgets"
  type             = "AMAZON_DYNAMODB"
  service_role_arn = aws_iam_role.api.arn

  dynamodb_config {
    table_name = aws_dynamodb_table.widgets.name
  }
}

locals {
  resolvers = {
    widget        = { key = "`widget#$${ctx.args.widget_id}`", answer = "ctx.result" }
    widgets_total = { key = "'total#widgets'", answer = "ctx.result ? ctx.result.count : 0" }
  }
}

resource "aws_appsync_resolver" "widgets" {
  for_each    = local.resolvers
  api_id      = aws_appsync_graphql_api.widgets.id
  type        = "Query"
  field       = each.key
  data_source = aws_appsync_datasource.widgets.name

  runtime {
    name            = "APPSYNC_JS"
    runtime_version = "1.0.0"
  }

  code = <<-EOT
    import * as ddb from '@aws-appsync/utils/dynamodb';
    export function request(ctx) {
      return ddb.get({ key: { pk: ${each.value.key} } });
    }
    export function response(ctx) {
      return ${each.value.answer};
    }
  EOT
}

output "graphql_url" {
  value = aws_appsync_graphql_api.widgets.uris["GRAPHQL"]
}
