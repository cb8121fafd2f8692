/**
 * Separates JSON texts of different rows in one text parameter (`string_to_array($n, E'\\x1e')`): escaping an array of
 * texts costs more than the statement. JSON never contains it unescaped.
 */
export const ROW_SEPARATOR = '\u001e';
