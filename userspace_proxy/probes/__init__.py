"""Active health checks: probes of endpoints, the verdicts on them, and desired state without unhealthy endpoints."""
