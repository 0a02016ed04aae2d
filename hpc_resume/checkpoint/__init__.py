"""State to boxes to shards to manifest, and back. Knows no scheduler."""
