"""The API of Errata, version 1: protocol buffers and the code generated from them."""
