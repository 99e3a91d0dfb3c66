"""From tile IR to PTX modules. Calls `inst.emit(ctx)`; never imports the instructions."""
