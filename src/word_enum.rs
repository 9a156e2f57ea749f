//! Reasons and modes as types: each one is declared once, with its documentation, its name and its word.

/// Declares an enum, each of whose values has a word. `ALL` lists them, and `as_str` is the word for options, metrics and JSON.
macro_rules! words {
    ($(#[$about:meta])* $enum:ident { $($(#[$doc:meta])* $name:ident = $word:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $enum {
            $($(#[$doc])* $name,)*
        }

        impl $enum {
            #[allow(dead_code)] // not every set of words is listed
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }
        }

        impl std::fmt::Display for $enum {
            fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

pub(crate) use words;
