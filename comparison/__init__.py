"""Models side by side: their answers, their numbers, the page to vote on, and the task on a cluster."""
