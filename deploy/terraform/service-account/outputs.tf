output "bus_name" {
  value = aws_cloudwatch_event_bus.service.name
}

output "forward_role_arn" {
  value = aws_iam_role.forward.arn
}

output "undelivered_queue_url" {
  description = "What could not be forwarded; alarm on its depth."
  value       = aws_sqs_queue.undelivered.id
}
