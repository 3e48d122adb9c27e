"""The service that scores trajectories against the truth, by the call and from Kafka."""
