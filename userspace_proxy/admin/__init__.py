"""For operators: health, metrics and the control socket. No code here handles packets."""
