SELECT count(*) AS n FROM sp_orders o LEFT JOIN sp_items i ON i.oid = o.id WHERE i.qty IS NULL
SELECT count(*) AS n FROM sp_orders o LEFT JOIN sp_items i ON i.n = o.cust AND i.qty > 3 WHERE i.qty IS NULL
SELECT count(*) AS n FROM sp_kinds k LEFT JOIN sp_orders o ON o.kind = k.kind WHERE o.total IS NULL OR o.total > 5
SELECT count(*) AS n FROM sp_kinds k LEFT JOIN sp_orders o ON o.kind = k.kind AND k.w > 2 AND o.total > 100
SELECT k.w, count(o.id) AS n FROM sp_kinds k LEFT JOIN (sp_orders o JOIN sp_items i ON i.oid = o.id AND i.qty > 2) ON o.kind = k.kind GROUP BY 1
SELECT count(*) AS n FROM (sp_kinds k RIGHT JOIN sp_orders o ON o.kind = k.kind) LEFT JOIN sp_items i ON i.oid = o.id
SELECT count(*) AS n FROM sp_orders o RIGHT JOIN sp_kinds k ON o.kind = k.kind WHERE coalesce(o.total, 0) < 50
SELECT count(*) AS n FROM sp_orders a FULL JOIN sp_orders b ON a.id = b.id AND a.cust > 5
SELECT count(*) AS n FROM sp_orders a FULL JOIN sp_items b ON a.id = b.oid LEFT JOIN sp_kinds k ON k.kind = a.kind
SELECT o.id, x.m FROM sp_orders o CROSS JOIN LATERAL (SELECT max(i.qty) AS m FROM sp_items i WHERE i.oid = o.id) x WHERE o.id < 50
SELECT o.id FROM sp_orders o WHERE o.total = (SELECT max(p.total) FROM sp_orders p WHERE p.kind = o.kind)
SELECT o.id FROM sp_orders o WHERE o.id = ANY (SELECT oid FROM sp_items) AND o.id <> ALL (SELECT n FROM sp_items WHERE n IS NOT NULL)
SELECT o.kind, (SELECT count(*) FROM sp_items i WHERE i.oid = min(o.id)) AS c FROM sp_orders o GROUP BY o.kind
SELECT o.kind, (SELECT sum(o.total)) AS c FROM sp_orders o GROUP BY o.kind
SELECT (SELECT count(k.w + o.cust) FROM sp_kinds k) AS c, o.id FROM sp_orders o WHERE id < 10
SELECT kind FROM sp_orders GROUP BY kind HAVING count(*) > (SELECT avg(w) FROM sp_kinds)
SELECT kind FROM sp_orders GROUP BY kind HAVING sum(total) > (SELECT avg(total) FROM sp_orders)
SELECT kind, count(*) AS n FROM sp_orders GROUP BY kind HAVING EXISTS (SELECT FROM sp_kinds k WHERE k.kind = sp_orders.kind)
SELECT id, kind FROM sp_orders ORDER BY (SELECT w FROM sp_kinds k WHERE k.kind = sp_orders.kind), id LIMIT 7
SELECT id FROM sp_orders WHERE (id, cust) IN (SELECT oid, n FROM sp_items)
SELECT id FROM sp_orders WHERE (id, cust) > (100, 3) ORDER BY id LIMIT 5
SELECT id FROM sp_orders LIMIT (SELECT 0)
SELECT id FROM sp_orders ORDER BY id LIMIT (SELECT count(*) FROM sp_kinds)
SELECT id FROM sp_orders ORDER BY id LIMIT NULL
SELECT id FROM sp_orders ORDER BY id LIMIT ALL OFFSET 390
SELECT id FROM sp_orders ORDER BY id LIMIT 2 + 3
(SELECT id FROM sp_orders ORDER BY id DESC LIMIT 3) UNION ALL (SELECT oid FROM sp_items ORDER BY oid, n LIMIT 2) ORDER BY 1
(SELECT kind FROM sp_orders EXCEPT SELECT kind FROM sp_kinds WHERE w > 1) INTERSECT SELECT kind FROM sp_orders
SELECT kind, count(*) AS n FROM sp_orders GROUP BY 1 UNION ALL SELECT 'all', count(*) FROM sp_orders
SELECT sum(n) AS s FROM (SELECT count(*) AS n FROM sp_orders GROUP BY kind) q
SELECT max(s) AS m FROM (SELECT kind, sum(total) AS s FROM sp_orders GROUP BY kind HAVING count(*) > 3) q WHERE kind <> 'a'
WITH a AS (SELECT kind, sum(total) AS s FROM sp_orders GROUP BY kind), b AS (SELECT max(s) AS m FROM a) SELECT a.kind FROM a, b WHERE a.s = b.m
WITH sp_orders AS (SELECT * FROM sp_orders WHERE cust = 3) SELECT count(*) AS n FROM sp_orders
WITH k AS (SELECT * FROM sp_kinds WHERE w > 1) SELECT k.w, count(*) AS n FROM k JOIN sp_orders o USING (kind) GROUP BY 1
WITH k AS MATERIALIZED (SELECT * FROM sp_kinds WHERE w > 1) SELECT o.id FROM sp_orders o WHERE kind IN (SELECT kind FROM k) AND cust IN (SELECT w FROM k)
WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 5) SELECT r.n, count(o.id) AS c FROM r LEFT JOIN sp_orders o ON o.cust = r.n GROUP BY 1
WITH x AS (SELECT id FROM sp_orders ORDER BY total DESC NULLS LAST, id LIMIT 20) SELECT count(*) AS n, sum(qty) AS q FROM sp_items WHERE oid IN (SELECT id FROM x)
SELECT count(*) AS n FROM (VALUES (1), (2), (NULL)) v(x) JOIN sp_orders o ON o.cust = v.x
SELECT o.id, v.x FROM sp_orders o, (VALUES (1), (2)) v(x) WHERE o.id < 5
SELECT count(*) AS n FROM sp_orders o JOIN sp_items i ON o.id = i.oid JOIN sp_items j ON j.oid = i.oid
SELECT count(*) AS n FROM sp_orders o, sp_items i, sp_items j WHERE o.id = i.oid AND j.oid = o.id AND i.n < j.n
SELECT count(*) AS n FROM sp_orders o JOIN sp_items i ON o.id = i.oid OR o.cust = i.n
SELECT count(*) AS n FROM sp_loose a JOIN sp_loose b ON a.k IS NOT DISTINCT FROM b.k
SELECT k, count(*) AS n, grouping(k) AS g FROM sp_loose GROUP BY CUBE (k)
SELECT k, v, count(*) AS n FROM sp_loose GROUP BY k, ROLLUP (v)
SELECT DISTINCT k FROM sp_loose
SELECT count(DISTINCT k) AS n, count(DISTINCT v) AS m, sum(DISTINCT v) AS s, count(*) AS c FROM sp_loose
SELECT k, count(DISTINCT v) FILTER (WHERE v > 3) AS n, avg(DISTINCT v) AS a, max(v) AS m FROM sp_loose GROUP BY k
SELECT v, array_agg(DISTINCT k ORDER BY k DESC) AS a FROM sp_loose GROUP BY v
SELECT count(DISTINCT (k, v)) AS n FROM sp_loose
SELECT count(DISTINCT 1) AS n, count(DISTINCT NULL::int) AS m FROM sp_loose
SELECT 'x' AS c, count(*) AS n FROM sp_orders GROUP BY 'x'::text, kind IS NULL
SELECT 1 AS one, count(*) AS n FROM sp_orders GROUP BY ()
SELECT kind || '!' AS k, upper(kind) AS u, count(*) AS n FROM sp_orders GROUP BY kind ORDER BY kind || '!' NULLS FIRST, count(*)
SELECT kind || '!' AS k, count(*) AS n FROM sp_orders GROUP BY kind || '!'
SELECT cust + 1 AS c, (cust + 1) * 2 AS d, count(*) AS n FROM sp_orders GROUP BY cust + 1
SELECT date_trunc('month', at) AS m, count(*) AS n, min(at) AS f FROM sp_orders GROUP BY 1 HAVING date_trunc('month', at) > '2024-03-01' ORDER BY 1 DESC
SELECT sum(total) OVER (PARTITION BY kind ORDER BY id ROWS 2 PRECEDING) AS s FROM sp_orders WHERE id < 30
SELECT kind, rank() OVER (ORDER BY sum(total) DESC NULLS LAST) AS r FROM sp_orders GROUP BY kind
SELECT first_value(id) OVER w AS f, id FROM sp_orders WINDOW w AS (PARTITION BY kind ORDER BY total, id)
SELECT DISTINCT ON (kind, flag) kind, flag, id FROM sp_orders ORDER BY kind, flag, at DESC, id LIMIT 6
SELECT avg(total) AS a, avg(total)::numeric(10,3) AS b, sum(total)/count(*) AS c, round(avg(cust), 3) AS d FROM sp_orders
SELECT min(kind) AS a, max(kind COLLATE "C") AS b, min(doc->>'x') AS c FROM sp_orders
SELECT string_agg(kind, ',' ORDER BY id) AS s FROM sp_orders WHERE id < 20
SELECT json_agg(id ORDER BY id) AS j, count(*) AS n FROM sp_orders WHERE id < 9
SELECT unnest(ARRAY[id, cust]) AS u FROM sp_orders ORDER BY 1 LIMIT 9
SELECT generate_series(1, 2) AS g, kind, count(*) AS n FROM sp_orders GROUP BY kind
SELECT id, generate_series(1, 3) AS g FROM sp_orders ORDER BY id, g LIMIT 5
SELECT q.a AS b, q.b AS a FROM (SELECT id AS a, cust AS b FROM sp_orders) q WHERE q.a < 5 ORDER BY q.b, q.a
SELECT a FROM (SELECT id AS a FROM sp_orders) q(a) GROUP BY a HAVING count(*) = 1 ORDER BY a LIMIT 3
SELECT count(*) AS n FROM (SELECT id AS k FROM sp_orders) a JOIN (SELECT oid AS k, n FROM sp_items) b USING (k)
SELECT count(*) AS n FROM (SELECT id + 0 AS k FROM sp_orders) a JOIN (SELECT oid AS k FROM sp_items) b USING (k)
SELECT count(*) AS n FROM sp_orders WHERE id::text LIKE '1%' OR id::int4 = 7
SELECT sum(id) AS s FROM sp_orders WHERE id = 7 OR (id = 9 AND kind IS NULL) OR false
SELECT count(*) AS n, sum(total) AS s, max(kind) AS m FROM sp_orders WHERE id = 1 AND id = 2
SELECT kind, count(*) AS n FROM sp_orders WHERE id BETWEEN 9 AND 4 GROUP BY kind
SELECT count(*) AS n FROM sp_orders o WHERE EXISTS (SELECT FROM sp_items i WHERE i.oid = o.id AND EXISTS (SELECT FROM sp_items j WHERE j.oid = i.oid AND j.n > i.n))
SELECT count(*) AS n FROM sp_orders o WHERE EXISTS (SELECT FROM sp_items i WHERE i.oid = o.id AND i.n > (SELECT avg(n) FROM sp_items))
SELECT count(*) AS n FROM sp_orders o WHERE o.kind IN (SELECT kind FROM sp_kinds ORDER BY w LIMIT 2)
SELECT o.id FROM sp_orders o WHERE o.cust = (SELECT w FROM sp_kinds k WHERE k.kind = o.kind) ORDER BY 1
SELECT count(*) AS n FROM sp_big b JOIN sp_sums s ON s.cust = b.w
SELECT * FROM sp_sums ORDER BY cust
SELECT s.cust, o.n FROM sp_sums s JOIN (SELECT cust, count(*) AS n FROM sp_orders GROUP BY cust) o USING (cust)
SELECT id AS "dask_shardsql_rows", total AS "g0", cust AS c0 FROM sp_orders ORDER BY "g0" NULLS FIRST, 1 LIMIT 4
SELECT count(*) AS a0, sum(cust) AS g0, kind AS a1 FROM sp_orders GROUP BY kind ORDER BY a0, g0, a1
SELECT "sp_orders".kind AS "Sum", sum(total) AS "KIND" FROM sp_orders GROUP BY 1 ORDER BY "KIND" NULLS FIRST
SELECT CASE WHEN kind = 'a' THEN 'first' WHEN count(*) > 60 THEN kind END AS c, count(*) FILTER (WHERE NOT flag) AS f FROM sp_orders GROUP BY kind
SELECT coalesce(nullif(kind, 'a'), 'none') AS c, count(*) AS n FROM sp_orders GROUP BY coalesce(nullif(kind, 'a'), 'none')
SELECT extract(dow FROM at) AS d, avg(extract(epoch FROM span)) AS e FROM sp_orders GROUP BY 1
SELECT count(*) AS n FROM sp_orders WHERE at > now() - interval '100 years' AND random() < 2
SELECT current_date > '2000-01-01' AS c, count(*) AS n FROM sp_orders
SELECT count(*) AS n FROM sp_codes a JOIN sp_codes b ON a.code = b.code
SELECT count(*) AS n FROM sp_padded a JOIN sp_codes b ON a.code = b.code
SELECT a.code::text AS c, count(*) AS n FROM sp_padded a GROUP BY 1
SELECT i.oid, o.kind, rank() OVER (PARTITION BY i.oid ORDER BY i.n, i.qty) AS r FROM sp_items i LEFT JOIN sp_orders o ON o.id = i.oid
SELECT o.id, count(i.n) AS n FROM sp_orders o LEFT JOIN sp_items i ON i.oid = o.id GROUP BY o.id
SELECT i.oid, count(*) AS n FROM sp_orders o RIGHT JOIN sp_items i ON i.oid = o.id GROUP BY i.oid
SELECT o.id, count(*) AS n FROM sp_orders o RIGHT JOIN sp_items i ON i.oid = o.id GROUP BY o.id
SELECT o.id, count(*) AS n FROM sp_orders o FULL JOIN sp_items i ON i.oid = o.id GROUP BY o.id
SELECT id, count(*) AS n FROM (SELECT o.id FROM sp_orders o FULL JOIN sp_items i ON i.oid = o.id) q GROUP BY id
SELECT count(*) AS n FROM sp_kinds k WHERE NOT EXISTS (SELECT FROM sp_orders o WHERE o.kind = k.kind AND o.total > 900)
SELECT k.kind FROM sp_kinds k WHERE k.w > (SELECT count(*) FROM sp_orders o WHERE o.kind = k.kind AND k.w > 3) OR k.w = 1
SELECT k.kind, (SELECT count(*) FROM sp_orders o WHERE o.kind = k.kind AND o.cust > k.w) AS n FROM sp_kinds k WHERE k.w > 0
SELECT k.kind FROM sp_kinds k LEFT JOIN sp_kinds j ON j.w = k.w + 1 AND EXISTS (SELECT FROM sp_orders o WHERE o.kind = j.kind) WHERE k.w > 0 AND j.w IS NULL
SELECT var_pop(x)::text AS v, stddev(x)::text AS s, avg(x)::text AS a, sum(x)::text AS t FROM (SELECT CASE WHEN id = 7 THEN 'NaN' ELSE total END AS x FROM sp_orders) q
SELECT var_pop(total * 1000000000000)::text AS v, stddev_samp(total / 1000000007)::text AS s, stddev(total)::text AS t, var_samp(id)::text AS u, stddev_pop(small)::text AS w FROM sp_orders
SELECT kind, stddev_pop(total)::text AS v, stddev_samp(total * 1e20)::text AS s, stddev(cust)::text AS t, variance(total / 3)::text AS w FROM sp_orders GROUP BY kind
SELECT cust, stddev(total)::text AS v, var_pop(total)::text AS s, avg(total / 7)::text AS a FROM sp_orders GROUP BY cust
SELECT var_pop(x)::text AS v, stddev(x)::text AS s FROM (SELECT CASE WHEN id = 7 THEN 'Infinity' ELSE total END AS x FROM sp_orders) q
SELECT sum(x)::text AS v, avg(x)::text AS s FROM (SELECT CASE WHEN id = 7 THEN 'Infinity' WHEN id = 8 THEN '-Infinity' ELSE total END AS x FROM sp_orders) q
SELECT var_pop(5.5)::text AS v, stddev(0.1 + id * 0)::text AS s, stddev(1e-30 * id)::text AS t FROM sp_orders
SELECT (SELECT count(o.id) FROM sp_kinds k LIMIT 1) AS c FROM sp_orders o
SELECT sum(9000000000000000000::int8) AS s, avg(9000000000000000000::int8) AS a FROM sp_orders WHERE id < 9
SELECT sum(2000000000) AS s FROM sp_orders
SELECT max(o) AS m FROM (SELECT oid AS o FROM sp_items) o
SELECT count(DISTINCT o.id) AS n, count(DISTINCT i.n) AS m FROM sp_orders o JOIN sp_items i ON i.oid = o.id
SELECT o.kind, count(DISTINCT o.id) AS n, sum(i.qty) AS q FROM sp_orders o LEFT JOIN sp_items i ON i.oid = o.id GROUP BY o.kind
SELECT count(*) AS n FROM sp_orders WHERE id = ANY ('{3,6,9}'::int8[])
SELECT count(*) AS n FROM sp_orders WHERE id IN (3, NULL, 6)
SELECT count(*) AS n FROM sp_orders WHERE NOT (id IN (3, 6))
SELECT count(*) AS n FROM sp_orders WHERE id BETWEEN SYMMETRIC 6 AND 3
SELECT count(*) AS n FROM sp_orders WHERE id = 3.0
SELECT count(*) AS n FROM sp_orders WHERE id = 3::numeric OR id = '6'
SELECT count(*) AS n FROM sp_orders WHERE 3 = id OR 6 = id
SELECT count(*) AS n FROM sp_orders WHERE (id = 3) IS NOT FALSE
SELECT count(*) AS n FROM sp_orders WHERE (id = 3) IS NOT TRUE
SELECT count(*) AS n FROM sp_orders WHERE CASE WHEN id = 3 THEN true ELSE id = 4 END
SELECT count(*) AS n FROM sp_orders o LEFT JOIN sp_items i ON i.oid = o.id AND i.oid = 3
SELECT count(*) AS n FROM sp_orders o LEFT JOIN sp_items i ON i.oid = o.id WHERE i.oid = 3
SELECT count(*) AS n FROM sp_orders o LEFT JOIN sp_items i ON i.oid = o.id WHERE i.oid = 3 OR i.oid IS NULL
SELECT count(*) AS n FROM sp_orders o FULL JOIN sp_items i ON i.oid = o.id WHERE o.id = 3
SELECT count(*) AS n FROM sp_big WHERE id = 30
SELECT count(*) AS n FROM (SELECT id AS z FROM sp_orders UNION ALL SELECT oid FROM sp_items) q WHERE z = 3
SELECT a.id FROM sp_orders a, sp_items b WHERE a.id = b.oid AND b.oid = 3
SELECT a.id FROM sp_orders a WHERE a.id IN (SELECT oid FROM sp_items WHERE oid = 3)
SELECT a.id FROM sp_orders a WHERE a.id = 4 AND a.cust IN (SELECT n FROM sp_items WHERE oid = 3)
SELECT a.id FROM sp_orders a WHERE a.id = 4 AND EXISTS (SELECT FROM sp_items b WHERE b.oid = 3)
SELECT a.id FROM sp_orders a WHERE a.id = 3 AND EXISTS (SELECT FROM sp_items b WHERE b.oid = 3)
SELECT a.id, (SELECT sum(qty) FROM sp_items) AS s FROM sp_orders a WHERE a.id = 3
SELECT kind FROM sp_kinds WHERE NOT EXISTS (SELECT FROM sp_orders o WHERE o.kind = sp_kinds.kind)
SELECT w FROM sp_kinds WHERE w IN (SELECT cust FROM sp_orders) ORDER BY w
SELECT w FROM sp_kinds WHERE w NOT IN (SELECT cust FROM sp_orders) ORDER BY w
SELECT w FROM sp_kinds k WHERE w IN (SELECT o.cust FROM sp_orders o WHERE o.kind <> k.kind) ORDER BY w
SELECT w FROM sp_kinds k WHERE EXISTS (SELECT FROM sp_orders o JOIN sp_items i ON i.n = o.cust WHERE o.cust < k.w AND i.qty > k.w)
SELECT w FROM sp_kinds k WHERE EXISTS (SELECT FROM sp_orders o WHERE o.cust = k.w HAVING count(*) > 3)
SELECT w FROM sp_kinds k WHERE EXISTS (SELECT FROM sp_orders o WHERE o.cust = k.w OFFSET 3)
SELECT w FROM sp_kinds k WHERE w IN (SELECT count(*) FROM sp_orders o WHERE o.cust = k.w)
SELECT w FROM sp_kinds k WHERE EXISTS (SELECT FROM sp_orders o WHERE o.cust = k.w AND 1 < (SELECT count(*) FROM sp_items i WHERE i.n = o.cust))
SELECT w FROM sp_kinds k WHERE EXISTS (SELECT FROM sp_items i WHERE i.price::text LIKE '%0' AND i.qty > k.w)
