"""Atlas: a small, really trained LLaVA that knows an old atlas, and the recipe that makes it."""
