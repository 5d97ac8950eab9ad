"""What commands say of a user's mistakes, and the page that lists it (docs/messages.md)."""
