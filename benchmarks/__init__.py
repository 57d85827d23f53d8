"""Measurements. A regular package, because opacus installs one called ``benchmarks`` that would shadow it."""
