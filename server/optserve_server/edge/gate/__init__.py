"""Limits of calls: how many have a place and a thread, how long they may wait, how many bytes they may hold."""
