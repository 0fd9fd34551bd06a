//! Constants of the programs that only the loader knows, written into the object's own bytes. (aya does
//! so too, but a loader of aya's that has once been told one keeps it for all objects.)

use std::io;

use object::{Object, ObjectSection, ObjectSymbol};

/// Writes `bytes` over the constant called `name`.
///
/// # Errors
/// Where the object has no such constant, or one of another size.
pub fn write(object: &mut [u8], name: &str, bytes: &[u8]) -> io::Result<()> {
    let at = place(object, name, bytes.len()).and_then(|at| usize::try_from(at).ok());
    let place = at.and_then(|at| object.get_mut(at..at.checked_add(bytes.len())?));
    place
        .ok_or_else(|| io::Error::other(format!("the programs have no constant {name}")))?
        .copy_from_slice(bytes);
    Ok(())
}

/// Where in the file the constant called `name` begins.
fn place(object: &[u8], name: &str, size: usize) -> Option<u64> {
    let file = object::File::parse(object).ok()?;
    let symbol = file.symbols().find(|symbol| symbol.name() == Ok(name))?;
    let section = file.section_by_index(symbol.section_index()?).ok()?;
    let (begin, length) = section.file_range()?;
    let end = symbol.address().checked_add(symbol.size())?;
    (symbol.size() == size as u64 && end <= length).then_some(begin + symbol.address())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::OBJECT;

    #[test]
    fn a_constant_is_written_and_nothing_else() {
        let mut object = OBJECT.to_vec();
        write(&mut object, "MARK", &[1, 2, 3, 4]).unwrap();
        let at = place(OBJECT, "MARK", 4).unwrap() as usize;
        assert_eq!(object[at..at + 4], [1, 2, 3, 4]);
        assert_eq!(object[..at], OBJECT[..at]);
        assert_eq!(object[at + 4..], OBJECT[at + 4..]);
    }

    #[test]
    fn what_is_no_constant_of_that_size_is_refused() {
        let mut object = OBJECT.to_vec();
        for (name, bytes) in [
            ("MARK", &[0; 8][..]),
            ("NOTHING", &[0; 4]),
            ("EVENTS", &[0; 4]),
        ] {
            assert!(write(&mut object, name, bytes).is_err(), "{name}");
        }
        assert!(write(&mut [0; 64], "MARK", &[0; 4]).is_err());
        assert_eq!(object, OBJECT);
    }
}
