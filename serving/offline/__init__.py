"""What is done to models before they are served: `tilus quantize` writes them anew, quantised. No part of the server, which never
imports it."""
