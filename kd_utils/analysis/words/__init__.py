"""How is it said? Tables for a reader, answers by rule, and the lines above and around them."""
