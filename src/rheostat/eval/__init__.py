"""Quality under the dial, against what it costs."""
