"""Several machines: which shard has which function, who is there; what is needed of Kubernetes."""
