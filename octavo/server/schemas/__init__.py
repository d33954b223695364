"""What requests may hold, as pydantic models: names, types and bounds. Meaning is the routes' matter."""
