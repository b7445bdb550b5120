"""The scLong model: gene encoder, expression encoder, dual Performer encoder, decoder."""
