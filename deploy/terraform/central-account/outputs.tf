output "bus_arn" {
  description = "For service-account."
  value       = aws_cloudwatch_event_bus.central.arn
}

output "bus_name" {
  description = "relay.sink.bus; for widgets and lake."
  value       = aws_cloudwatch_event_bus.central.name
}

output "relay_queue_url" {
  description = "relay.source.queue_url"
  value       = module.incoming.queue_url
}

output "relay_dead_letter_queue_url" {
  description = "What could not be delivered to the relay; alarm on its depth."
  value       = module.incoming.dead_letter_queue_url
}

output "quarantine_queue_url" {
  description = "relay.quarantine.queue_url; what broke its contract, with the reasons. Alarm on its depth."
  value       = aws_sqs_queue.quarantine.id
}

output "relay_policy_arn" {
  description = "For the role of the relay's container."
  value       = aws_iam_policy.relay.arn
}

output "archive_arn" {
  description = "For aws events start-replay."
  value       = aws_cloudwatch_event_archive.valid.arn
}

output "reverse_queue_url" {
  description = "reverse.source.queue_url of the bridge."
  value       = module.reverse.queue_url
}
