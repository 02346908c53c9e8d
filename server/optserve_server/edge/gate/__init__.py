"""Who is let in, for how long, and with how much: places and threads of calls, what their clients owe, what waits."""
