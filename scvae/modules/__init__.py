"""What programs are built of: networks, decoders, posteriors, priors, codebooks, poses and pixels."""
