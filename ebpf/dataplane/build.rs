//! Builds the kernel programs and hands their object to the crate.

#[path = "../programs/compile.rs"]
mod compile;

fn main() {
    for (binary, variable) in [
        ("omerta-programs", "OMERTA_PROGRAMS"),
        ("omerta-redirect", "OMERTA_REDIRECT"),
        ("omerta-uplink", "OMERTA_UPLINK"),
    ] {
        match compile::compile("..", binary, "") {
            Ok(object) => println!("cargo::rustc-env={variable}={}", object.display()),
            Err(message) => {
                // Cargo shows a build script's standard error when it fails.
                eprintln!("error: {message}");
                std::process::exit(1);
            }
        }
    }
}
