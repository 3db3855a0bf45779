//! The two macros in which every key of a recipe is written down exactly once.
//!
//! A line of `section!` holds a key's name, type, default, allowed values and documentation. The struct field,
//! the reader, the writer, the JSON Schema and the reference page are all made from that one line.

/// Declares an enum whose variants are spelled as strings in a recipe: `Variant = "name" | "alias" | ...`.
/// The first spelling is the one written back.
macro_rules! choice {
    (
        $(#[doc = $about:expr])*
        pub enum $name:ident {
            $( $(#[doc = $doc:expr])* $variant:ident = $spelling:literal $(| $alias:literal)*; )+
        }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $( $(#[doc = $doc])* $variant, )+
        }

        impl $name {
            /// The spelling used in recipes.
            pub const fn name(self) -> &'static str {
                match self {
                    $( Self::$variant => $spelling, )+
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl crate::spec::Choice for $name {
            const VARIANTS: &'static [crate::spec::Variant<Self>] = &[
                $( crate::spec::Variant {
                    value: Self::$variant,
                    names: &[$spelling $(, $alias)*],
                }, )+
            ];

            fn spelling(&self) -> &'static str {
                self.name()
            }
        }
    };
}

/// Declares a section of a recipe: `key: Type = fallback => spec;`, and after the struct, when its keys depend on each
/// other, `check function;`, which is called with the section as read, its node and the reader.
macro_rules! section {
    (
        $(#[doc = $about:expr])*
        $(#[derive($derive:path)])?
        $vis:vis struct $name:ident {
            $( $(#[doc = $doc:expr])* $key:ident: $ty:ty = $fallback:expr => $spec:expr; )+
        }
        $( check $check:path; )?
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug, PartialEq $(, $derive)?)]
        $vis struct $name {
            $( $(#[doc = $doc])* pub $key: $ty, )+
        }

        impl crate::spec::Section for $name {
            const ABOUT: &'static [&'static str] = &[$($about),*];

            const KEYS: &'static [&'static str] = &[$(stringify!($key)),+];

            fn fields() -> Vec<crate::spec::Field> {
                vec![
                    $( crate::spec::Field::of::<$ty>(stringify!($key), &[$($doc),*], &$fallback, &$spec), )+
                ]
            }

            fn read(node: &crate::node::Node, reader: &mut crate::spec::Reader<'_>) -> Option<Self> {
                let entries = reader.keys::<Self>(node)?;
                #[allow(unused_mut)]
                let mut section = Self {
                    $( $key: reader.take::<$ty>(entries, stringify!($key), $fallback, &$spec)?, )+
                };
                $( $check(&mut section, node, reader); )?
                Some(section)
            }

            fn write(&self) -> crate::node::Node {
                crate::node::Node::map([
                    $( (stringify!($key), crate::spec::write::<$ty>(&$spec, &self.$key)), )+
                ])
            }
        }
    };
}
