//! Reasons as types: each one is declared once, with its documentation, its name and its word.

/// Declares an enum of reasons. `ALL` lists them, and `as_str` is the word for metrics and JSON.
macro_rules! reasons {
    ($(#[$about:meta])* $enum:ident { $($(#[$doc:meta])* $name:ident = $word:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $enum {
            $($(#[$doc])* $name,)*
        }

        impl $enum {
            /// Every reason.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The word for it in metrics and JSON.
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

pub(crate) use reasons;
