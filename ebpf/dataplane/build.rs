//! Builds the kernel programs and hands their object to the crate.

#[path = "../programs/compile.rs"]
mod compile;

fn main() {
    match compile::compile("..", "omerta-programs", "") {
        Ok(object) => println!("cargo::rustc-env=OMERTA_PROGRAMS={}", object.display()),
        Err(message) => {
            // Cargo shows a build script's standard error when it fails.
            eprintln!("error: {message}");
            std::process::exit(1);
        }
    }
}
