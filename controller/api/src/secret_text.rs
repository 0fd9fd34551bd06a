//! Text that is told to nobody but omertad.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

/// A text that its `Debug` does not show and that is wiped when it is dropped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretText(String);

impl SecretText {
    /// The text, for who checks it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for SecretText {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(..)")
    }
}

impl Drop for SecretText {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_text_on_the_wire_and_nothing_in_a_log() {
        let secret: SecretText = serde_json::from_str("\"guess\"").unwrap();
        assert_eq!(secret.expose(), "guess");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"guess\"");
        assert!(!format!("{secret:?}").contains("guess"));
    }
}
