-- What wrk has measured, in one line: requests, microseconds, three latencies in microseconds, failures.
function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.timeout + errors.status
  print(string.format("done %d %d %.1f %.1f %.1f %d", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9), failed))
end
