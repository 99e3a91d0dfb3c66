"""PTX as typed objects: module, builder, printer, parser and assembler. Knows nothing of tiles."""
