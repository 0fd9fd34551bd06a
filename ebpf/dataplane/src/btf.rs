//! Where the running kernel keeps the fields of its structures, from its own type information.
//!
//! Only what finding a field takes is read of the format (Documentation/bpf/btf.rst).

/// A field: its distance from the start of its structure, and its length where it is a bit field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// In bits, counted as the kernel counts them: from the lowest bit on little-endian machines,
    /// from the highest on big-endian ones.
    pub bit_offset: u32,
    /// In bits; 0 where the field is no bit field.
    pub bits: u32,
}

/// Type information in the format of `/sys/kernel/btf/vmlinux`.
pub struct Btf<'a> {
    strings: &'a [u8],
    /// The bytes of each type, from its head; type 1 stands first.
    types: Vec<&'a [u8]>,
}

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNCTION: u32 = 12;
const ENUMERATOR: usize = 8;
const HEAD: usize = 12;
const MEMBER: usize = 12;
/// Anonymous members lie within one another less deep than this.
const DEEPEST: u32 = 8;

impl<'a> Btf<'a> {
    /// Reads the table of types, or `None` where the bytes are not of the format.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        if u16::from_ne_bytes(*bytes.first_chunk()?) != MAGIC {
            return None;
        }
        let body = bytes.get(word(bytes, 4)? as usize..)?;
        let section = |at| {
            let (from, length) = (word(bytes, at)? as usize, word(bytes, at + 4)? as usize);
            body.get(from..from.checked_add(length)?)
        };
        let (mut rest, strings) = (section(8)?, section(16)?);
        let mut types = Vec::with_capacity(rest.len() / 24);
        while !rest.is_empty() {
            let info = word(rest, 4)?;
            let members = (info & 0xffff) as usize;
            let tail = match kind(info) {
                1 | 14 | 17 => 4,
                3 => 12,
                KIND_STRUCT | KIND_UNION | 15 | 19 => members * MEMBER,
                6 | 13 => members * 8,
                2 | 7..=12 | 16 | 18 => 0,
                _ => return None,
            };
            let (one, others) = rest.split_at_checked(HEAD + tail)?;
            types.push(one);
            rest = others;
        }
        Some(Self { strings, types })
    }

    /// The fields of `structure` called `names`, also those within its anonymous members.
    pub fn fields<const N: usize>(&self, structure: &str, names: [&str; N]) -> Option<[Field; N]> {
        let holder = *self.types.get(self.place(KIND_STRUCT, structure)?)?;
        let mut found = [Field {
            bit_offset: 0,
            bits: 0,
        }; N];
        for (field, name) in found.iter_mut().zip(names) {
            *field = self.member(holder, name, 0, DEEPEST)?;
        }
        Some(found)
    }

    /// The number of the type of the structure called `name`.
    pub fn structure(&self, name: &str) -> Option<usize> {
        Some(self.place(KIND_STRUCT, name)? + 1)
    }

    /// The number of the type of the function called `name`.
    pub fn function(&self, name: &str) -> Option<usize> {
        Some(self.place(KIND_FUNCTION, name)? + 1)
    }

    fn place(&self, of_kind: u32, name: &str) -> Option<usize> {
        self.types.iter().position(|of| {
            word(of, 4).is_some_and(|info| kind(info) == of_kind) && self.is_called(of, 0, name)
        })
    }

    /// The values of the constants called `names`, from enumerations of up to 32 bits; `None` for
    /// those that this kernel does not have.
    pub fn constants<const N: usize>(&self, names: [&str; N]) -> [Option<u32>; N] {
        let mut found = [None; N];
        for of in &self.types {
            if word(of, 4).is_none_or(|info| kind(info) != KIND_ENUM) {
                continue;
            }
            let members = of.get(HEAD..).unwrap_or_default();
            for constant in members.chunks_exact(ENUMERATOR) {
                let place = names
                    .iter()
                    .position(|name| self.is_called(constant, 0, name));
                if let Some(value) = place.and_then(|place| found.get_mut(place)) {
                    *value = word(constant, 4);
                }
            }
        }
        found
    }

    fn member(&self, holder: &[u8], name: &str, base: u32, depth: u32) -> Option<Field> {
        let info = word(holder, 4)?;
        for member in holder.get(HEAD..)?.chunks_exact(MEMBER) {
            let place = word(member, 8)?;
            // With this bit set, the upper byte of a place is the length of a bit field.
            let (place, bits) = if info >> 31 == 1 {
                (place & 0x00ff_ffff, place >> 24)
            } else {
                (place, 0)
            };
            let bit_offset = base.checked_add(place)?;
            if self.is_called(member, 0, name) {
                return Some(Field { bit_offset, bits });
            }
            if word(member, 0)? != 0 || depth == 0 {
                continue;
            }
            let Some(inner) = (word(member, 4)? as usize)
                .checked_sub(1)
                .and_then(|index| self.types.get(index))
            else {
                continue;
            };
            if matches!(kind(word(inner, 4)?), KIND_STRUCT | KIND_UNION) {
                let within = self.member(inner, name, bit_offset, depth - 1);
                if within.is_some() {
                    return within;
                }
            }
        }
        None
    }

    fn is_called(&self, of: &[u8], at: usize, name: &str) -> bool {
        let text = word(of, at).and_then(|from| self.strings.get(from as usize..));
        text.and_then(|text| text.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn kind(info: u32) -> u32 {
    (info >> 24) & 0x1f
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct box { int plain; union { struct { char low:2; char high:3; }; }; }`, its names at
    /// 1, 5 and so on.
    fn sample() -> Vec<u8> {
        let strings = b"\0box\0plain\0low\0high\0int\0ONE\0EIGHT\0";
        let at = |name: &str| {
            let wanted = [name.as_bytes(), &[0]].concat();
            strings
                .windows(wanted.len())
                .position(|window| window == wanted)
                .unwrap() as u32
        };
        let structure = |members: u32, bit_fields: u32| bit_fields << 31 | 4 << 24 | members;
        let types = [
            // 1: int. 2: the inner structure. 3: the union. 4: the box.
            [at("int"), 1 << 24, 4, 32].as_slice(),
            &[0, structure(2, 1), 1],
            &[at("low"), 1, 2 << 24],
            &[at("high"), 1, 3 << 24 | 2],
            &[0, 5 << 24 | 1, 1],
            &[0, 2, 0],
            &[at("box"), structure(2, 0), 8],
            &[at("plain"), 1, 0],
            &[0, 3, 32],
            // 5: an enumeration.
            &[0, KIND_ENUM << 24 | 2, 4],
            &[at("ONE"), 1, at("EIGHT"), 8],
        ]
        .concat();
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        for number in [24, 0, 4 * types.len() as u32, 4 * types.len() as u32] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend((strings.len() as u32).to_ne_bytes());
        for number in types {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn fields_are_found_also_within_anonymous_members() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        let field = |bit_offset, bits| Field { bit_offset, bits };
        assert_eq!(
            btf.fields("box", ["plain", "low", "high"]),
            Some([field(0, 0), field(32, 2), field(34, 3)])
        );
        assert_eq!(btf.fields("box", ["lo"]), None);
        assert_eq!(btf.fields("bo", ["low"]), None);
        assert_eq!((btf.structure("box"), btf.function("box")), (Some(4), None));
    }

    #[test]
    fn constants_are_found_by_name() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(
            btf.constants(["EIGHT", "MISSING", "ONE"]),
            [Some(8), None, Some(1)]
        );
    }

    #[test]
    fn bytes_that_are_cut_short_are_refused() {
        let bytes = sample();
        for length in 0..bytes.len() {
            assert!(Btf::parse(&bytes[..length]).is_none(), "{length}");
        }
    }
}
