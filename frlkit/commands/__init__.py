"""The command line: `studies`, what the notebooks and their runs need; `networks`, anyone's; `options`, shared."""
