"""The service that draws pixels: crops (Perceptive Zoomer) and registered comparisons."""
