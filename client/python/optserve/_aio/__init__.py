"""What the asyncio client is made of."""
