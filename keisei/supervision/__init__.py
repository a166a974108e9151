"""Who is alive: exit detection, hang detection, restart policy, the shutdown ladder."""
