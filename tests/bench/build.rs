//! Builds the kernel programs that are measured and never shipped.

#[path = "../../ebpf/programs/compile.rs"]
mod compile;

fn main() {
    match compile::compile("../../ebpf", "omerta-bench-programs", "bench") {
        Ok(object) => println!(
            "cargo::rustc-env=OMERTA_BENCH_PROGRAMS={}",
            object.display()
        ),
        Err(message) => {
            // Cargo shows a build script's standard error when it fails.
            eprintln!("error: {message}");
            std::process::exit(1);
        }
    }
}
