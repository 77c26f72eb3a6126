"""What code for ARM costs, counted and modelled on this machine: instructions under qemu, cycles by llvm-mca."""
