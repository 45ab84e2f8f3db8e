"""What makes events by itself: schedules."""
