//! `key.path=value` arguments, laid over the tree that the recipe was read into.

use crate::error::{Place, Problem};
use crate::node::{Content, Entry, Node};
use crate::spec::Reader;

/// Lays every argument over `root`, later ones over earlier ones. A key that is not there yet is created, so that a
/// misspelt one is reported as it is in a file. Items of a list are addressed by their index from 0; the index after the
/// last adds an item.
pub(crate) fn apply(root: &mut Node, arguments: &[String], reader: &mut Reader<'_>) {
    for argument in arguments {
        if let Err(problem) = apply_one(root, argument) {
            reader.push(*problem);
        }
    }
}

fn apply_one(root: &mut Node, argument: &str) -> Result<(), Box<Problem>> {
    let place = Place::Argument(argument.to_owned());
    let form = "key.path=value";
    let Some((path, text)) = argument.split_once('=') else {
        return Err(Problem::new("", &place, "has no `=`").allowed(form).into());
    };
    let keys: Vec<_> = path.split('.').collect();
    if keys.iter().any(|key| key.trim().is_empty()) {
        return Err(Problem::new(path, &place, "has an empty key").allowed(form).into());
    }
    let value = Node::from_yaml(text, Some(&place)).map_err(|error| {
        let problem = Problem::new(path, &place, format!("the value is not YAML: {error}"));
        Box::new(problem.found(text).allowed("a YAML value; put quotes around a string with special characters"))
    })?;
    if has_comment(text, &value, &place) {
        let problem = Problem::new(path, &place, "a part of the value is a YAML comment and would be lost").found(text);
        return Err(problem.allowed("quotes around a string with ` #` in it, as in `'output=\"a #b\"'`").into());
    }
    *reach(root, &keys, path, &place)? = value;
    Ok(())
}

/// Whether `text`, which is read as `value`, has a comment in it: then a letter more at the end of its line makes no
/// difference.
fn has_comment(text: &str, value: &Node, place: &Place) -> bool {
    let mut end = 0;
    text.split_inclusive('\n').any(|line| {
        let content = line.trim_end_matches('\n');
        let more = end + content.len();
        end += line.len();
        let longer = || Node::from_yaml(&format!("{}x{}", &text[..more], &text[more..]), Some(place));
        content.contains('#') && longer().is_ok_and(|longer| longer == *value)
    })
}

/// The node at `keys`, made if it is not there. A scalar on the way gives way to a mapping.
fn reach<'n>(root: &'n mut Node, keys: &[&str], path: &str, place: &Place) -> Result<&'n mut Node, Box<Problem>> {
    let empty = || Node::new(Content::Map(Vec::new()), place.clone());
    let mut node = root;
    for key in keys {
        if !matches!(node.content, Content::List(_) | Content::Map(_)) {
            *node = empty();
        }
        node = match &mut node.content {
            Content::List(items) => {
                let count = items.len();
                match key.parse::<usize>() {
                    Ok(index) if index <= count => {
                        if index == count {
                            items.push(empty());
                        }
                        &mut items[index]
                    }
                    _ => {
                        return Err(Problem::new(path, place, "there is no such item in the list")
                            .found(key)
                            .allowed(format!("an index from 0 to {count}"))
                            .into());
                    }
                }
            }
            Content::Map(entries) => {
                let index = entries.iter().position(|entry| entry.key == *key);
                let index = index.unwrap_or_else(|| {
                    entries.push(Entry::new((*key).to_owned(), place.clone(), empty()));
                    entries.len() - 1
                });
                &mut entries[index].value
            }
            _ => unreachable!("a scalar was just replaced by a mapping"),
        };
    }
    Ok(node)
}
