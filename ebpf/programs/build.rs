//! The map that hangs on sockets needs its types described, which the linker does from debugging information.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bin=service=--btf");
}
