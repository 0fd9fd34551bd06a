//! A pair of interfaces, each the other's wire.

use crate::{Namespace, StageError, interface};

/// Two interfaces of the current namespace that are each other's wire. They last until their
/// namespace does, or until [`Veth::remove`].
#[derive(Debug)]
pub struct Veth {
    /// One end's name.
    pub near: String,
    /// The other end's name.
    pub far: String,
}

impl Veth {
    /// Makes the pair in the current namespace, both ends down.
    ///
    /// # Errors
    /// Where a name is taken or too long, or without root.
    pub fn pair(near: &str, far: &str) -> Result<Self, StageError> {
        interface::ip(&format!("link add {near} type veth peer name {far}"))?;
        Ok(Self {
            near: near.to_owned(),
            far: far.to_owned(),
        })
    }

    /// Makes the pair across two namespaces, both ends down.
    ///
    /// # Errors
    /// Where a name is taken or too long, or without root.
    pub fn across(near: (&Namespace, &str), far: (&Namespace, &str)) -> Result<Self, StageError> {
        near.0.ip(&format!(
            "link add {} type veth peer name {} netns {}",
            near.1,
            far.1,
            far.0.name()
        ))?;
        Ok(Self {
            near: near.1.to_owned(),
            far: far.1.to_owned(),
        })
    }

    /// Sets both ends up; both must be in the current namespace.
    ///
    /// # Errors
    /// Where an end was moved away or removed.
    pub fn up(&self) -> Result<(), StageError> {
        interface::bring_up(&self.near)?;
        interface::bring_up(&self.far)
    }

    /// Removes the pair; the near end must be in the current namespace.
    ///
    /// # Errors
    /// Where the near end was moved away or removed.
    pub fn remove(self) -> Result<(), StageError> {
        interface::ip(&format!("link delete {}", self.near))
    }
}
