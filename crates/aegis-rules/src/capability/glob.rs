//! Patterns: `*` stands for any text without `/`, `**` for any text, everything else for itself.

/// A part of a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// This byte.
    Byte(u8),
    /// Any text without `/`.
    Star,
    /// Any text.
    Any,
}

/// A pattern, ready to be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Glob(Vec<Token>);

impl Glob {
    /// Every text is a pattern.
    pub(crate) fn new(text: &str) -> Glob {
        let mut tokens = Vec::with_capacity(text.len());
        let mut bytes = text.bytes().peekable();
        while let Some(byte) = bytes.next() {
            tokens.push(match byte {
                b'*' if bytes.next_if_eq(&b'*').is_some() => Token::Any,
                b'*' => Token::Star,
                byte => Token::Byte(byte),
            });
        }
        Glob(tokens)
    }

    /// A text that stands for itself, whatever is in it.
    pub(crate) fn literal(text: &str) -> Glob {
        Glob(text.bytes().map(Token::Byte).collect())
    }

    /// The pattern for any text.
    pub(crate) fn any() -> Glob {
        Glob(vec![Token::Any])
    }

    /// The same pattern with another one behind it.
    pub(crate) fn then(mut self, text: &str) -> Glob {
        self.0.extend(Glob::new(text).0);
        self
    }

    /// Whether every text of `other` is one of this. Where it says yes it is so; some that are so
    /// it does not find (`a*` and `*a` together), which is the side to err on.
    pub(crate) fn covers(&self, other: &Glob) -> bool {
        let wide = &self.0;
        let mut now = vec![false; wide.len() + 1];
        now[0] = true;
        self.skip_empty(&mut now);
        for token in &other.0 {
            let mut next = vec![false; wide.len() + 1];
            for (at, mine) in wide.iter().enumerate().filter(|(at, _)| now[*at]) {
                match (mine, token) {
                    (Token::Byte(a), Token::Byte(b)) if a == b => next[at + 1] = true,
                    (Token::Star, Token::Byte(b)) if *b != b'/' => next[at] = true,
                    (Token::Star, Token::Star) | (Token::Any, _) => next[at] = true,
                    (Token::Byte(_) | Token::Star, _) => {}
                }
            }
            self.skip_empty(&mut next);
            if !next.contains(&true) {
                return false;
            }
            now = next;
        }
        now[wide.len()]
    }

    /// Stars may stand for nothing.
    fn skip_empty(&self, at: &mut [bool]) {
        for (i, token) in self.0.iter().enumerate() {
            if at[i] && !matches!(token, Token::Byte(_)) {
                at[i + 1] = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, text: &str) -> bool {
        Glob::new(pattern).covers(&Glob::literal(text))
    }

    #[test]
    fn stars_stop_at_slashes_and_double_stars_do_not() {
        for (pattern, text, expected) in [
            ("node:*", "node:22", true),
            ("node:*", "node:", true),
            ("node:*", "node", false),
            ("node:*", "evil/node:22", false),
            ("ghcr.io/acme/*", "ghcr.io/acme/bot:1", true),
            ("ghcr.io/acme/*", "ghcr.io/acme/a/b", false),
            ("ghcr.io/acme/**", "ghcr.io/acme/a/b", true),
            ("ghcr.io/acme/**", "ghcr.io/acmeevil/a", false),
            ("", "", true),
            ("", "a", false),
            ("**", "a/b", true),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abcd", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    proptest! {
        /// What is covered is covered for every text.
        #[test]
        fn covering_is_never_wrong(
            wide in "[ab/*]{0,6}", narrow in "[ab/*]{0,6}", text in "[ab/]{0,8}",
        ) {
            if Glob::new(&wide).covers(&Glob::new(&narrow)) && matches(&narrow, &text) {
                prop_assert!(matches(&wide, &text));
            }
        }
    }
}
