//! `omerta-fuzz-seeds DIR`: writes the corpus's frames as inputs, one file each.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let directory = std::env::args_os()
        .nth(1)
        .ok_or("usage: omerta-fuzz-seeds DIR")?;
    for case in omerta_corpus::cases()? {
        std::fs::write(PathBuf::from(&directory).join(case.name), case.frame)?;
    }
    Ok(())
}
